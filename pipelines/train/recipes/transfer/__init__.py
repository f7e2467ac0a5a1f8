"""The motion adapter's side of training: captioned clips, loss, pictures, export."""
