"""Python imports this first where this folder is on its path: each process of verl starts two of twenty seconds sooner.

transformers imports scikit-learn where it finds it, for a kind of generation that nothing here uses.
"""

import sys

sys.modules["sklearn"] = None  # type: ignore[assignment]  # which is how a module is hidden
