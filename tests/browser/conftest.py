import asyncio, sys, time, pytest
from tests.browser import test_dashboard as t
from tests.end_to_end.client import get as real
n=[0]
async def slow_get(url, *a, **k):
    s=time.monotonic(); r=await real(url,*a,**k); n[0]+=1
    if time.monotonic()-s>0.5: print("SLOW", n[0], url[-6:], round(time.monotonic()-s,2), r.status, r.headers.get("x-cache"), r.headers.get("x-data-source"), file=sys.stderr, flush=True)
    return r
t.get=slow_get
