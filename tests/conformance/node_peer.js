// The Node client of test_peers.py: `node node_peer.js PROTOS ADDRESS`, with gRPC's packages on NODE_PATH.
// It loads our protos unmodified and calls both services, with inputs as numbers and as raw bytes.
'use strict'
const assert = require('node:assert')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')

const [protos, address] = process.argv.slice(2)
const load = (file) =>
  grpc.loadPackageDefinition(
    loader.loadSync(file, { includeDirs: [protos], keepCase: true, longs: Number, enums: String, defaults: true }),
  )
const insecure = grpc.credentials.createInsecure()
const triton = new (load('inference/open_inference.proto').inference.GRPCInferenceService)(address, insecure)
const pool = new (load('poolrpc/v1/pool.proto').poolrpc.v1.PoolService)(address, insecure)
const call = (client, method, request) =>
  new Promise((resolve, reject) => client[method](request, (error, response) => (error ? reject(error) : resolve(response))))
const floats = (bytes) => Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i))

async function main() {
  assert.strictEqual((await call(triton, 'ServerLive', {})).live, true)
  assert.deepStrictEqual(
    (await call(triton, 'ModelMetadata', { name: 'stem' })).inputs.map((input) => input.name),
    ['input'],
  )

  const numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
  const input = { name: 'input', datatype: 'FP32', shape: [1, 1, 4, 4] }
  const layer = { layer: { string_param: 'MaxPool2d(2)' } }
  const typed = { model_name: 'pool', id: 'a', parameters: layer, inputs: [{ ...input, contents: { fp32_contents: numbers } }] }
  const response = await call(triton, 'ModelInfer', typed)
  assert.strictEqual(response.id, 'a')
  assert.deepStrictEqual(response.outputs[0].shape, [1, 1, 2, 2])
  assert.deepStrictEqual(floats(response.raw_output_contents[0]), [6, 8, 14, 16])

  const raw = Buffer.from(Float32Array.from(numbers).buffer)
  const request = { model_name: 'pool', parameters: layer, inputs: [input], raw_input_contents: [raw] }
  assert.deepStrictEqual(floats((await call(triton, 'ModelInfer', request)).raw_output_contents[0]), [6, 8, 14, 16])

  await assert.rejects(call(triton, 'ModelInfer', { ...request, model_name: 'none' }), { code: grpc.status.NOT_FOUND })

  const stream = triton.ModelStreamInfer()
  const responses = []
  const ended = new Promise((resolve, reject) => stream.on('end', resolve).on('error', reject))
  stream.on('data', (response) => responses.push(response))
  for (const id of ['x', 'y']) stream.write({ ...request, id })
  stream.end()
  await ended
  assert.deepStrictEqual(responses.map((each) => each.infer_response.id), ['x', 'y'])

  const native = await call(pool, 'Pool', {
    input: { dtype: 'DATA_TYPE_FLOAT32', shape: [1, 1, 4, 4] },
    branches: [{ layers: [{ max_pool: { spatial_dims: 2, kernel_size: [2] } }] }],
    payload: raw,
  })
  assert.deepStrictEqual(floats(native.payload), [6, 8, 14, 16])
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error)
    process.exit(1)
  },
)
