"""Transcode audio to Opus while it is being sent: ffmpeg between the request's body and the response's.

    python3 ../pothead.py --stream-requests -- python3 ../pothead_worker.py --workers 2 transcode:app
    curl -T song.wav localhost:8080/ -o song.opus

Run it in this directory. Without --stream-requests the hub takes the whole body before a worker is
asked, so that a slow uploader does not occupy one. The input can be whatever ffmpeg reads from a pipe.
"""

import contextlib
import shutil
import subprocess
import threading

FFMPEG = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin"]
COMMAND = [*FFMPEG, "-i", "pipe:0", "-vn", "-c:a", "libopus", "-b:a", "64k", "-f", "ogg", "pipe:1"]
CHUNK_BYTES = 16 << 10


def app(environ, start_response):
    """Answer with what ffmpeg makes of the request's body."""
    if environ["REQUEST_METHOD"] not in ("POST", "PUT"):
        start_response("405 Method Not Allowed", [("Content-Type", "text/plain"), ("Allow", "POST, PUT")])
        yield b"Send audio here.\n"
        return
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ffmpeg:
        feeder = threading.Thread(target=feed, args=(environ["wsgi.input"], ffmpeg))
        guard = threading.Thread(target=kill_when_cancelled, args=(environ["pothead.cancelled"], ffmpeg))
        feeder.start()
        guard.start()
        try:
            chunk = ffmpeg.stdout.read1(CHUNK_BYTES)
            if not chunk and ffmpeg.wait():
                start_response("422 Unprocessable Content", [("Content-Type", "text/plain")])
                yield b"This is no audio that ffmpeg understands.\n"
                return
            start_response("200 OK", [("Content-Type", "audio/ogg")])
            while chunk:
                yield chunk
                chunk = ffmpeg.stdout.read1(CHUNK_BYTES)
            if ffmpeg.wait() and not environ["pothead.cancelled"].is_set():
                raise RuntimeError("ffmpeg failed midway")  # cuts the response, which is not whole
        finally:  # also when the worker closes this generator because the consumer has left
            ffmpeg.kill()
            feeder.join()


def feed(body, ffmpeg):
    """Write the body to ffmpeg, until one of them ends."""
    with contextlib.suppress(OSError), ffmpeg.stdin:
        shutil.copyfileobj(body, ffmpeg.stdin, CHUNK_BYTES)


def kill_when_cancelled(cancelled, ffmpeg):
    """Watch while the app waits for ffmpeg's next bytes, which may never come."""
    while ffmpeg.poll() is None:
        if cancelled.wait(0.1):
            ffmpeg.kill()
