"""DisMo's side of training: samples, loss, metrics, pictures, export."""
