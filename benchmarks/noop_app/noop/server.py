"""Times rounds of messages to all nodes. Replies are polled for every 50 ms; Flower's own loop waits 3 s."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    count, side = int(settings["arrays"]), int(settings["side"])
    seconds: list[float] = []
    for round_ in range(int(settings["rounds"])):
        begun = time.perf_counter()
        arrays = {str(i): Array(np.full(side, round_, np.float32)) for i in range(count)}
        content = RecordDict({"arrays": ArrayRecord(arrays)})
        messages = [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]
        waiting = set(grid.push_messages(messages))
        while waiting:
            for reply in grid.pull_messages(waiting):
                if reply.has_error():
                    raise RuntimeError(reply.error.reason)
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(0.05 if waiting else 0.0)
        seconds.append(time.perf_counter() - begun)
        Path(str(settings["output"])).write_text(json.dumps(seconds))
