"""What a child process that compares answers says to its parent: one byte each."""

READY = b"r"
EQUAL = b"1"
DIFFERENT = b"0"
TOO_LARGE = b"x"
