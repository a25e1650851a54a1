"""One module a family: launch, `torch.library` operator with its fake, autograd."""
