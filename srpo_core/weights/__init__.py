"""Weights in files: reading them safely, recognising whose they are, and converting names tensor by tensor."""
