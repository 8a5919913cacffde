"""Install pip from PyPI for the Python that runs this. For environments without ensurepip, such as Debian's."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

INDEX = "https://pypi.org/simple/pip/"
WHEEL = "pip-25.3-py3-none-any.whl"

with urlopen(INDEX) as answer:
    link = re.search(rf'href="([^"#]*{re.escape(WHEEL)})', answer.read().decode())
with tempfile.TemporaryDirectory() as folder:
    wheel = Path(folder) / WHEEL
    with urlopen(urljoin(INDEX, link[1])) as answer:
        wheel.write_bytes(answer.read())
    # pip runs from its own wheel.
    sys.exit(subprocess.call([sys.executable, f"{wheel}/pip", "install", "--no-index", str(wheel)]))
