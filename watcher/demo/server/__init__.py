"""The parts of the small Ollama server. Read them in this order: each imports only from above.

settings    what the environment says
errors      what goes wrong, in the words of the real server
log         one line on stderr
files       reading and removing files, with those errors
gojson      JSON as Go reads and writes it
goglob      globs as Go does them
names       what a model is called
manifests   what a manifest says
store       where manifests and blobs lie
cleanup     which blobs are removed
start       what a server's start does to its store
context     giving something up, and all that hangs on it
client      asking the registry
statuses    what a client is told while it waits
parts       the parts of a download, and their sidecars
transfer    fetching the missing parts
download    the download of one layer, shared by all who want it
pull        pulling a model
models      making, copying and removing a model, and storing its layers
listing     what `list` shows
streams     work that goes on in a thread of its own, and its client
api         the paths of the HTTP API
"""
