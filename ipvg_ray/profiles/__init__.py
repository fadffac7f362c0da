"""Built-in configuration profiles, one YAML file each."""
