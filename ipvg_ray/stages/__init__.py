"""One file a stage: what it needs and adds, what it asks of the machine, how it calls its model."""
