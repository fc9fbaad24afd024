"""The official EAT, ASDA and SSLAM code: its checkpoints read without running anything in them, and written."""
