"""Package metadata. The modules need nothing but the standard library; every dependency is an extra."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` of pothead.py without importing it: building must not run the program."""
    match = re.search(r'^__version__\b.*= "([^"]+)"$', read_text("pothead.py"), re.MULTILINE)
    if match is None:
        raise SystemExit("setup.py: pothead.py has no __version__")
    return match.group(1)


def read_text(name: str) -> str:
    path = HERE / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="pothead",
    version=read_version(),
    description="A queue for expensive HTTP requests: workers dial in and serve one at a time",
    long_description=read_text("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    py_modules=["gating", "pothead", "pothead_worker"],
    python_requires=">=3.10",
    extras_require={
        "metrics": ["prometheus-client"],
        "gating": ["psutil"],
        "test": ["pytest"],
    },
    entry_points={
        "console_scripts": [
            "pothead = pothead:main",
            "pothead-worker = pothead_worker:main",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        # Not "Typing :: Typed": of what is installed, type checkers believe packages only (PEP 561). They do
        # believe these modules where they are copied into a project.
    ],
)
