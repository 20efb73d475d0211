"""Files of a merge: tensor layouts, buffers, overlapping reads and writes, the output folder."""
