"""Building the miniature's weights: pictures in bulk, the stages, and what they share (see ../build_miniature.py)."""
