"""Sort the lines of a text, all in memory: as many at a time as the machine or the container has memory for.

    python3 ../pothead.py -- python3 ../pothead_worker.py --poll-jobs memory_hungry:app
    sort -R /usr/share/dict/words | curl -T - localhost:8080/

Run it in this directory. `gating.py` must be installed, or lie beside `pothead_worker.py`. A worker with
--poll-jobs asks `app.wait_for_slot` before it takes a request. Try it in a container with a memory limit.
"""

import gating

MAX_BODY_BYTES = 16 << 20
BYTES_PER_JOB = 72 * MAX_BODY_BYTES  # as measured at the worst, with lines of one letter


def app(environ, start_response):
    """Answer with the sorted lines of the request's body."""
    if environ["REQUEST_METHOD"] not in ("POST", "PUT"):
        start_response("405 Method Not Allowed", [("Content-Type", "text/plain"), ("Allow", "POST, PUT")])
        return [b"Send a text here.\n"]
    text = environ["wsgi.input"].read(MAX_BODY_BYTES + 1)
    if len(text) > MAX_BODY_BYTES:
        start_response("413 Content Too Large", [("Content-Type", "text/plain")])
        return [b"Send at most 16 MiB.\n"]
    body = b"".join(sorted(text.splitlines(keepends=True)))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


app.wait_for_slot = gating.wait_for_free_memory(BYTES_PER_JOB, max_concurrent=8)
