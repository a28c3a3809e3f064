# Your app with its packages, on top of the image that Dockerfile makes. Copy it into the directory of your app, put
# the packages into requirements.txt (for example: flask), the app's name into the last line, and there:
#   docker build -f app.Dockerfile -t myapp .
#   docker run --rm -v /etc/pothead/worker:/run/pothead:ro myapp pothead-worker \
#     --connect=https://hub.example:4443 --cafile=/run/pothead/hub.pem --token-file=/run/pothead/token myapp:app
# A hub with it behind, to try it out:
#   docker run --rm -p 127.0.0.1:8080:8080 myapp pothead -- pothead-worker myapp:app
# What shall not be in the image (.git, venv, secrets) belongs into a .dockerignore.

FROM pothead:1.0.0
# The directory of the packages is root's: what serves requests shall not be able to change it.
USER 0:0
WORKDIR /srv/app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER 65532:65532
CMD ["pothead-worker", "myapp:app"]
