"""How fast the kernels are, against torch, against other libraries and against the machine's limit."""
