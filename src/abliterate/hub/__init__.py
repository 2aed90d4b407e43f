"""The Hugging Face hub: asked patiently, at one commit, and with the reason when it says no.

Everything goes through ``huggingface_hub``: its cache, its token, its endpoint (``HF_ENDPOINT``).
Checkpoints and prompts stand on this; what is done with the files is theirs. Uses ``console`` and
``storage``.
"""

from abliterate.hub.names import split_id as split_id
from abliterate.hub.names import suggested_id as suggested_id
from abliterate.hub.patience import patiently as patiently
from abliterate.hub.reasons import HubError as HubError
from abliterate.hub.reasons import asking as asking
from abliterate.hub.repository import RETRIES as RETRIES
from abliterate.hub.repository import HubRepo as HubRepo
from abliterate.hub.repository import is_commit as is_commit
from abliterate.hub.repository import known_commit as known_commit
from abliterate.hub.repository import look_up as look_up
