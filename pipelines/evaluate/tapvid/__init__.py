"""TAP-Vid: point tracks."""
