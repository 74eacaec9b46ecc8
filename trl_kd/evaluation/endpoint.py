"""One question to one model behind an OpenAI-compatible endpoint, with the standard library alone.

`huggingface_hub.InferenceClient` speaks the same protocol, but refuses every address, even one on this machine, while
`HF_HUB_OFFLINE` is set.
"""

import http.client
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


logger = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0


class EndpointError(RuntimeError):
    """The endpoint does not do its work: out of reach, access denied, or no OpenAI-compatible answers."""


class RefusedError(EndpointError):
    """The endpoint does not take this request, but may well take another one."""


class _Retry(Exception):
    """A failure that may pass; `wait` is what the endpoint asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class StoppedError(Exception):
    """The caller needs the answer no longer."""


class _Secret:
    """A string that shows in no repr, log or pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str):
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self):
        raise TypeError("An API key is not written anywhere.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The standard handler would send the key on to wherever the endpoint points."""

    def redirect_request(self, *args, **kwargs) -> None:
        return None


class ChatEndpoint:
    """
    A model behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`), asked at temperature 0.

    Args:
        base_url (`str`):
            Address of the API, such as `"http://localhost:8000/v1"`. Redirections are not followed.
        model (`str`):
            Name of the model there.
        api_key (`str`, *optional*):
            Sent as bearer token. Defaults to the environment variable `OPENAI_API_KEY`; without either, or with `""`,
            none is sent. It appears in no message, setting or file.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that the endpoint may be silent.
        retries (`int`, *optional*, defaults to `5`):
            Further attempts after a timeout, a lost connection, or status 408, 409, 429 or 5xx.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first further attempt; doubled each time up to a minute, or what `Retry-After` says.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Length at which an answer is cut.
        options (`dict`, *optional*):
            Further fields of the request, in place of those set here; `None` takes one out. A reasoning model may
            need `{"temperature": None, "max_tokens": None, "max_completion_tokens": 4096}`.

    Raises:
        ValueError: If the address, the key or a number cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
        max_tokens: int = 1024,
        options: Mapping[str, Any] | None = None,
    ):
        self.base_url = _check_base_url(base_url)
        self.model = model
        self._key = _check_key(os.environ.get("OPENAI_API_KEY") if api_key is None else api_key)
        check_count("retries", retries, 0)
        check_count("max_tokens", max_tokens, 1)
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}, so every request would fail. Set it to some seconds.")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_tokens, self.options = max_tokens, dict(options or {})
        self._opener = urllib.request.build_opener(_NoRedirect)
        address = urlsplit(self.base_url)
        if self._key and address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning(
                f"The API key is sent to `{self.base_url}` without encryption. Use an https address, or set "
                "`api_key=''` if the endpoint needs none."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.base_url!r}, model={self.model!r})"

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, and the address, ready for JSON and without the key."""
        return {
            "base_url": self.base_url,
            "model": self.model,
            "request": {"temperature": 0, "max_tokens": self.max_tokens} | self.options,
        }

    def ask(self, text: str, stop: threading.Event | None = None) -> str:
        """
        The model's answer to one message.

        Args:
            text (`str`):
                The message.
            stop (`threading.Event`, *optional*):
                Ends the wait between two attempts.

        Returns:
            `str`: the answer; empty if the model returns none.

        Raises:
            EndpointError: If the endpoint does not work.
        """
        stop = stop or threading.Event()
        message = {"model": self.model, "messages": [{"role": "user", "content": text}]} | self.settings()["request"]
        body = json.dumps({name: value for name, value in message.items() if value is not None}).encode()
        for attempt in range(self.retries + 1):
            if stop.is_set():
                raise StoppedError
            outcome = self._attempt(body)
            if isinstance(outcome, str):
                return outcome
            if not isinstance(outcome, _Retry):
                raise outcome
            if attempt < self.retries:
                stop.wait(min(max(self.backoff * 2**attempt, outcome.wait), _LONGEST_WAIT))
        raise EndpointError(
            f"The endpoint at `{self.base_url}` failed {self.retries + 1} times in a row: {outcome}. Finished "
            "answers are kept. Wait until it is well again and repeat the call, or send fewer requests at a time."
        )

    def _attempt(self, body: bytes) -> str | Exception:
        """
        The answer to one request, or what to raise.

        It is returned rather than raised, so that the exceptions of urllib, whose frames hold the headers, are no part
        of a traceback.
        """
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions",
            data=body,
            # Some hosts turn the standard agent of urllib away
            headers={"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "trl_kd"},
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key.reveal()}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._content(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return self._status_error(error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError | ConnectionResetError | BrokenPipeError):
                return _Retry(f"{error.reason}")
            return EndpointError(
                f"The endpoint at `{self.base_url}` cannot be reached: {self._excerpt(str(error.reason))}. Finished "
                "answers are kept. Start the endpoint, or correct `base_url`."
            )
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            return _Retry(self._excerpt(str(error)) or type(error).__name__)

    def _content(self, body: bytes) -> str | EndpointError:
        """Text of the first choice."""
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            content = body
        # No text, as in an answer that was used up by reasoning, is an answer without a verdict
        if content is None or isinstance(content, str):
            return content or ""
        return EndpointError(
            f"The endpoint at `{self.base_url}` answered {self._excerpt(_text(body))!r}, which is not an answer of a "
            "chat completion in JSON. `base_url` must be the address of an OpenAI-compatible API, often one that ends "
            "in `/v1`."
        )

    def _status_error(self, error: urllib.error.HTTPError) -> Exception:
        """What an error status means."""
        status, wait = error.code, error.headers.get("Retry-After", "")
        if status in (401, 403):
            # The body is left out: some hosts quote parts of the key in it
            sent = "with the API key that was given" if self._key else "without an API key"
            return EndpointError(
                f"The endpoint at `{self.base_url}` denies access (status {status}) {sent}. Set the environment "
                "variable `OPENAI_API_KEY` to a key that is valid there."
            )
        try:
            text = self._excerpt(_message(error.read()))
        except (OSError, http.client.HTTPException):
            text = ""
        reason = f"status {status}" + (f", {text!r}" if text else "")
        if status in (408, 409, 429) or status >= 500:
            return _Retry(reason, float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)
        if status in (400, 413, 422):
            return RefusedError(
                f"The endpoint at `{self.base_url}` refuses the request: {reason}. If it names a setting, change it "
                "with `options` or `max_tokens`; if the text is too long, use a model with a larger context."
            )
        return EndpointError(
            f"The endpoint at `{self.base_url}` does not serve `{self.model}` there: {reason}. Check `model` and "
            "`base_url` (often one that ends in `/v1`)."
        )

    def _excerpt(self, text: str) -> str:
        """The start of what an endpoint says, on one line, without the key."""
        if self._key:
            text = text.replace(self._key.reveal(), "***")
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:200] + "..."


def check_count(name: str, value: int, lowest: int) -> None:
    """Raises if a count is too small."""
    if value < lowest:
        raise ValueError(f"`{name}` is {value}, but it is a count. Set it to {lowest} or more.")


def _text(body: bytes) -> str:
    """An answer as text, whatever it is."""
    return body.decode("utf-8", errors="replace")


def _message(body: bytes) -> str:
    """`error.message` of an OpenAI-compatible answer, else the answer itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return _text(body)


def _check_base_url(base_url: str) -> str:
    """The address without a trailing slash or the path of a request."""
    if "@" in base_url:
        raise ValueError(
            "`base_url` holds a user name or password, which would appear in messages. Pass a key as `api_key`."
        )
    try:
        address = urlsplit(base_url)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        usable = usable and not address.query and not address.fragment
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", base_url):
        raise ValueError(
            f"`base_url` is {base_url!r}, which is no address of an API. Pass one like 'http://localhost:8000/v1'."
        )
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _check_key(key: str | None) -> _Secret | None:
    """The key, if there is one. http.client would quote a key that it can't send."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "The API key holds characters that no HTTP header can carry. Check `api_key` or `OPENAI_API_KEY`."
        )
    return _Secret(key) if key else None
