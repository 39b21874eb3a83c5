from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import urls
from data_pipelines.errors import BadSample


@settings(deadline=None, max_examples=300)
@given(
    st.text("htps:/.@\\[]%?#&= \t0127axé。１-_~", max_size=40).map("http://".__add__)
    | st.text(max_size=20).map("http://h/".__add__)
)
def test_an_accepted_spelling_has_one_reading(url: str) -> None:
    """What is sent is plain ASCII without blanks, and reading it again gives the same."""
    try:
        target = urls.parse(url, any_port=True)
    except BadSample:
        return
    assert all(33 <= ord(letter) < 127 for letter in target.url)
    assert urls.parse(target.url, any_port=True) == target
    assert urlsplit(target.url).hostname == target.host
    assert not {"@", "\\", "/", "?", "#"} & set(target.host)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1", "11.0.0.1",
     "223.255.255.255", "2606:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888", "2003::1"],
)  # fmt: skip
def test_the_public_internet_is_public(address: str) -> None:
    assert urls.is_public(address)
