"""TEMPORARY placeholder by the lead until the real one is written: overwrite freely, but keep a function
embed(embedder, requests: Sequence[EmbeddingRequest]) -> list[Vector] (at most one embedder call for each kind, de-duplicated)."""
import zlib
import numpy as np
class Embedder: pass
class H:
    name='hashing'; dimension=256
    def embed(self,texts,kind):
        out=np.zeros((len(texts),256),np.float32)
        for i,t in enumerate(texts):
            out[i,0]=1e-3
            for w in t.lower().split(): out[i,zlib.crc32(w.strip('.,?:').encode('utf8','replace'))%256]+=1
        return out/np.linalg.norm(out,axis=1,keepdims=True)
_h=H()
def get_embedder(n): return _h
def embed(e,reqs): return [e.embed([r.text],r.kind)[0] for r in reqs]
