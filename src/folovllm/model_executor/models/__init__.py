"""One short file per architecture; `registry` maps the name in config.json to its class."""
