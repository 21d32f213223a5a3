"""Gradients, processes, optimizers, averages, memory."""
