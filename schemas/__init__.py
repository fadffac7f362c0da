"""The tables of a run, one readable YAML file each; read them through `ipvg_ray.pipeline.schema`."""
