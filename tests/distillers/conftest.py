"""Let failing assertions of the shared contract tests show their values."""

import pytest

pytest.register_assert_rewrite("contract")
