"""`dftserve playground`: a page in the browser that asks a server with two settings side by side.

`server` gives the page and passes its requests on, with the API key, which the page never sees.
`static` is the page: plain modules, no build step, nothing from another host.
"""
