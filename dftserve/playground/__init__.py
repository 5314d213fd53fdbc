"""`dftserve playground`: a web page that compares two settings of a server side by side.

`server` serves the page and forwards its requests with the API key, which the page never gets.
`static` is the page: plain JavaScript modules, no build step, nothing loaded from another host.
"""
