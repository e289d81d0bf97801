"""What several test files share: tiny random models, and the real demo model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
