"""Writes the config's JSON schema, from which editors complete keys and check values.

python -m lumiere.config.json_schema configs/schema.json
"""

import json
import sys
from pathlib import Path

from lumiere.config.schema import RunConfig


def json_schema() -> str:
    """The JSON schema of a config file, as text."""
    schema = RunConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json_schema(), encoding="utf-8")
