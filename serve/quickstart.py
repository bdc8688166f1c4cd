"""The quickstart application as an object: `serve build serve.quickstart:app`, `serve run serve.quickstart:app`."""

from serve.app import build_app

app = build_app({})
