"""BatchNorm: how its tensors lie, what a call launches, its operators and its derivative."""
