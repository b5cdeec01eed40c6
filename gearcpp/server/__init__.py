"""`gearcpp serve`: llama.cpp's own server with a GEAR cache under it. Needs the extra: pip install "gearcpp[server]".

    cli/serve.py   the command
    settings.py    what a server and its models are, from the command line or a configuration file
    worker.py      a process with one model: llama.cpp's server (xllamacpp) on a socket of ours; options.py: its settings by llama-server's names
    states.py      what that server keeps of slots, packed
    model.py       that process as the gate sees it
    gate.py        what a request passes before llama.cpp's server sees it
    upstream.py    one request to that server; errors.py: what OpenAI's API says of a failure
    app.py         gate, models, /health and /metrics as one application

>>> from gearcpp.server.app import create_app, run
>>> from gearcpp.server.settings import ModelSettings, ServerSettings
>>> server = ServerSettings(port=8080)
>>> run(create_app(server, [ModelSettings(model="model.gguf", n_ctx=8192)]), server)
"""
