# capsrun in a container: for a CPU, or with --build-arg TORCH=cu128 for NVIDIA GPUs.
FROM python:3.12-slim

# A compiler builds the fast steps for the processor that it runs on, when they are first needed.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# cpu, or a version of CUDA as PyTorch's index has it.
ARG TORCH=cpu
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/${TORCH}

COPY . /capsrun
RUN pip install --no-cache-dir '/capsrun[samples,export]'

# What is read and written lies in the folder that is mounted here: data/, runs/, and the compiled steps.
WORKDIR /files
ENV HOME=/files/.home
ENTRYPOINT ["capsrun"]
