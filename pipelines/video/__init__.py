"""Video files: decode (upright, by timestamps), cuts, motion, signatures, encode, packets of a clip."""
