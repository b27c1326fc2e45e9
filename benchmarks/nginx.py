"""nginx configured for media, for both of its contenders."""

from __future__ import annotations

import getpass
import os
import shutil
from pathlib import Path

from benchmarks.processes import OwnProcess
from tests.servers.redis_server import free_port

_COMMON = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_rlimit_nofile 16384;
{processes}
events {{ worker_connections 8192; }}
http {{
    default_type application/octet-stream;
    access_log off;
    sendfile on;
    tcp_nopush off;  # on, it holds small answers back for up to 40 ms now and then
    tcp_nodelay on;
    keepalive_timeout 75s;
    keepalive_requests 1000000000;
    open_file_cache max=20000 inactive=600s;
    open_file_cache_valid 600s;
    open_file_cache_min_uses 1;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{http}
}}
"""

_STATIC = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location /api/v1/assets/ {{ alias {root}/; }}
    }}
"""

_CACHE = """
    proxy_cache_path {folder}/cache levels=1:2 keys_zone=media:64m max_size=60g inactive=30d use_temp_path=off;
    upstream source {{ server 127.0.0.1:{source_port}; keepalive 64; keepalive_timeout 4s; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location /api/v1/assets/ {{
            proxy_pass http://source/api/v1/files/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_cache media;
            proxy_cache_valid 200 30d;
            proxy_ignore_headers Cache-Control Expires;  # a storage node says max-age=0, but objects never change
            proxy_cache_lock on;
            proxy_cache_lock_timeout 60s;
            proxy_cache_lock_age 60s;
            add_header X-Cache $upstream_cache_status;
        }}
    }}
"""


class Nginx:
    """One nginx. With one worker it runs without a master process, so that nothing outlives this run."""

    def __init__(self, name: str, folder: Path, workers: int = 1) -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self.port = free_port()
        self._workers = workers
        command = [program(), "-p", str(self.folder), "-c", str(self._configuration), "-e", "stderr"]
        self.process = OwnProcess(name, command, folder)

    @property
    def _configuration(self) -> Path:
        return self.folder / "nginx.conf"

    def start_static(self, root: Path) -> None:
        """Serve the files below `root` as assets."""
        self._start(_STATIC.format(port=self.port, root=root))

    def start_cache(self, source_port: int) -> None:
        """Cache what the storage node on `source_port` has."""
        self._start(_CACHE.format(port=self.port, folder=self.folder, source_port=source_port))

    def _start(self, http: str) -> None:
        processes = "master_process off;" if self._workers == 1 else f"worker_processes {self._workers};"
        if os.geteuid() == 0 and self._workers > 1:
            processes = f"user {getpass.getuser()};\n{processes}"
        text = _COMMON.format(folder=self.folder, processes=processes, http=http)
        self._configuration.write_text(text)
        self.process.start().wait_listening(self.port)

    def stop(self) -> None:
        self.process.stop()


def program() -> str:
    """RuntimeError if nginx is not installed."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError("nginx not found: apt-get install nginx-light")
    return found
