"""The experiments that both papers call for, each a file of configuration over training and evaluation."""
