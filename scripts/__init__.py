"""What people run: the report, CIFAR-10 training, comparisons and benchmarks."""
