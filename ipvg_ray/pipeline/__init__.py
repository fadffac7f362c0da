"""The engine: stage contract, plan, checkpoints, execution, failures, progress. It knows no model."""
