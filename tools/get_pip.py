"""Install pip from PyPI for the Python that runs this. For environments without ensurepip, such as Debian's."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

INDEX = "https://pypi.org/pypi/pip/25.3/json"

with urlopen(INDEX) as answer:
    url = next(file["url"] for file in json.load(answer)["urls"] if file["url"].endswith(".whl"))
url = urljoin(INDEX, url)
with tempfile.TemporaryDirectory() as folder:
    wheel = Path(folder) / url.rpartition("/")[2]
    with urlopen(url) as answer:
        wheel.write_bytes(answer.read())
    # pip runs from its own wheel.
    sys.exit(subprocess.call([sys.executable, f"{wheel}/pip", "install", "--no-index", str(wheel)]))
