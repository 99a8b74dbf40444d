"""The server's own pages come whole from the package."""

import re

from headrace.server.pages import FOLDER

OUTSIDE = re.compile(r"""(?:src|href)=["'](?:https?:)?//""")


def test_pages_are_public_and_ask_no_other_host(shared):
    with shared.client() as http:
        http.headers.pop("authorization")
        for path in ("/", "/docs"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert not OUTSIDE.search(answer.text)
            assert "script-src 'self'" in answer.headers["content-security-policy"]
            for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
                assert http.get(name).status_code == 200, name


def test_only_the_packages_own_files_are_static(shared):
    with shared.client() as http:
        for path in ("/static/../pages.py", "/static/%2e%2e/pages.py", "/static/none.js", "/static//etc/passwd"):
            assert http.get(path).status_code == 404, path


def test_vendored_files_name_version_and_licence():
    folder = FOLDER / "swagger-ui"
    assert re.search(r"\d+\.\d+\.\d+ from the npm registry", (folder / "README.md").read_text())
    assert "Apache License" in (folder / "LICENSE").read_text()
