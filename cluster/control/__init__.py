"""Make it so: all input and output of the control path."""
