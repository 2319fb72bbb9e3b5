"""What the losses and softmax share: reductions, targets, few passes over tensors, and kernels."""
