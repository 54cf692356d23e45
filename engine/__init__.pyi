from engine.api import Curve as Curve
from engine.api import Session as Session
from engine.api import attach as attach
from engine.api import fork as fork
from engine.api import resume as resume
from engine.api import sessions as sessions
from engine.api import start as start

__version__: str
