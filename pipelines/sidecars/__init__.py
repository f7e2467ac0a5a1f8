"""What lies beside clips: flow and tracks, their formats, and the frame that the stages writing them share."""
