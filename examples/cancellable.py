"""Search for large primes, and stop at once when nobody waits for them any more.

    python3 ../pothead.py -- python3 ../pothead_worker.py cancellable:app
    curl localhost:8080/?digits=200
    curl --max-time 1 localhost:8080/?digits=900

Run it in this directory. The second consumer leaves after a second. `pothead.cancelled`, a
threading.Event, is set within a tenth of a second, and the slot is free for the next request.
"""

import re
import secrets
import time
from urllib.parse import parse_qs


def app(environ, start_response):
    """Answer with a random prime of so many digits."""
    cancelled = environ["pothead.cancelled"]
    digits = parse_qs(environ["QUERY_STRING"]).get("digits", ["100"])[0]
    if not re.fullmatch(r"[1-9][0-9]{0,2}", digits):
        start_response("400 Bad Request", [("Content-Type", "text/plain")])
        return [b"digits is a number from 1 to 999\n"]
    began_s, tried = time.monotonic(), 0
    while not cancelled.is_set():  # between two steps of the computation, each of which is short
        candidate = 10 ** (int(digits) - 1) + secrets.randbelow(9 * 10 ** (int(digits) - 1))
        tried += 1
        if is_prime(candidate, cancelled):
            body = b"%d\n" % candidate
            start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
            return [body]
    environ["wsgi.errors"].write(f"cancelled after {time.monotonic() - began_s:.1f} s, {tried} candidates\n")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b""]  # nobody will read it


def is_prime(number, cancelled):
    """Apply the test of Miller and Rabin; the answer "no" of a cancelled job means nothing."""
    if number < 4 or number % 2 == 0:
        return number in (2, 3)
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    for _ in range(20):
        power = pow(2 + secrets.randbelow(number - 3), (number - 1) >> twos, number)
        if cancelled.is_set():
            return False
        squares = (pow(power, 1 << step, number) for step in range(twos))
        if power != 1 and number - 1 not in squares:
            return False
    return True
