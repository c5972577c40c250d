"""Stores on this machine, whose requests fail as they are told to.

Moto's server is Amazon's. Google's XML API is the same but for a few headers, which are translated here: what
is shown of gs:// is that the client's requests in Google's dialect do what they are meant to.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, Signature=0"
_JSON_MEDIA = re.compile(r"/storage/v1/b/([^/]+)/o/(.+)")
_ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"


@dataclass
class Faults:
    """What becomes of requests.

    Attributes:
        fails: says of a method and a path whether the request fails.
        status: with which status and code it does.
        delay: seconds that each one takes longer.
        requests: the methods and paths so far.
    """

    fails: Callable[[str, str], bool] = lambda method, path: False
    status: tuple[str, str] = ("503 Service Unavailable", "SlowDown")
    delay: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)


class Emulator:
    """Both stores at one address, each with a bucket.

    Attributes:
        faults: of the requests from now on.
        environment: with which clients find the stores and their credentials.
    """

    def __init__(self) -> None:
        self.faults = Faults()
        self._etags: dict[str, str] = {}
        self._amazon = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it tells every request
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "GOOGLE_BASE_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(
                {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
            ),
        }
        self._client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def mend(self) -> None:
        """Let no request fail any more."""
        self.faults = Faults()

    def close(self) -> None:
        self._server.shutdown()

    def names(self, below: str = "") -> set[str]:
        """Return the names of all objects."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=below)
        return {found["Key"] for page in pages for found in page.get("Contents", [])}

    def read(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def copy(self, folder: Path, to: str) -> None:
        """Copy a folder into the bucket, as gsutil and aws do."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.write(f"{to}/{file.relative_to(folder)}", file.read_bytes())

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=name)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        of_test = "boto" in environ.get("HTTP_USER_AGENT", "").lower()
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if not of_test:
            self.faults.requests.append(request)
            time.sleep(self.faults.delay)
            if self.faults.fails(*request):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                status, code = self.faults.status
                body = _ERROR.format(code).encode()
                start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return iter([body])
        if match := _JSON_MEDIA.fullmatch(environ["PATH_INFO"]):  # as array_record reads
            environ["PATH_INFO"] = environ["RAW_URI"] = environ["REQUEST_URI"] = f"/{match[1]}/{match[2]}"
            environ["QUERY_STRING"] = ""
        if not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):
            environ["HTTP_AUTHORIZATION"] = _AUTHORIZATION
        generation = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        if generation == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        elif generation is not None:
            environ["HTTP_IF_MATCH"] = self._etags.get(generation, '"another"')

        def answer(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            for etag in [value for name, value in headers if name.lower() == "etag"]:
                generation = str(int(hashlib.sha256(etag.encode()).hexdigest()[:12], 16))
                self._etags[generation] = etag
                headers = [*headers, ("x-goog-generation", generation)]
            return start(status, headers, *rest)

        return self._amazon(environ, answer)
