"""Only speed: delete this folder and every number stays what it is."""
