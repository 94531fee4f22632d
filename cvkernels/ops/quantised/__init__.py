"""Ops on bytes that stand for numbers, on the CPU: what ``freeze(..., dtype=torch.int8)`` runs."""
