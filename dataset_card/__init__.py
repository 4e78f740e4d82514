"""The dataset repository's card; an `__init__` so that the template is installed (see setup.cfg, `package_dir`)."""
