"""`gearcpp serve`: a server of OpenAI's API with a GEAR cache. Needs the extra: pip install "gearcpp[server]".

    cli/serve.py   the command
    app.py         llama-cpp-python's routes, /health and /metrics
    gate.py        API key, size limit, queue limit, disconnects, errors of streams
    requests.py    fields of OpenAI's API that those routes do not know
    proxy.py       the models by name; llama.py: a model whose answers come from the scheduler
    scheduler.py   several sequences decoded together; sequence.py: one of them; cells.py: the cells that they share

>>> from gearcpp.server.app import create_app, run
>>> from gearcpp.server.settings import GearModelSettings, GearServerSettings
>>> server = GearServerSettings(port=8080)
>>> run(create_app(server, [GearModelSettings(model="model.gguf", n_ctx=8192)]), server)
"""
