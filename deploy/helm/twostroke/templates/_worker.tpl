{{/* The pod of a worker, the same in every mode. Give dict "root" $ "component" ROLE "block" VALUES. */}}

{{- define "twostroke.workerSpec" -}}
{{- $root := .root -}}
{{- $block := .block -}}
{{ include "twostroke.podCommon" . }}
terminationGracePeriodSeconds: {{ default (add $root.Values.drainTimeoutSeconds 30) $block.terminationGracePeriodSeconds }}
{{- with concat (include "twostroke.modelDownload" (dict "root" $root "patterns" (list "*.json" "*.safetensors" "*.jinja" "tokenizer.model")) | fromYamlArray) $block.initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $root.Values.dra.claimTemplates }}
resourceClaims:
  {{- range $root.Values.dra.claimTemplates }}
  - {name: {{ .name }}, resourceClaimTemplateName: {{ include "twostroke.fullname" $root }}-{{ $.component }}-{{ .name }}}
  {{- end }}
{{- end }}
containers:
  {{- if eq $root.Values.mode "ray" }}
  {{- include "twostroke.rayNode" . | nindent 2 }}
  {{- end }}
  {{- include "twostroke.workerContainer" . | nindent 2 }}
  {{- with $block.extraContainers }}{{ toYaml . | nindent 2 }}{{ end }}
volumes:
  {{- include "twostroke.volumes" $root | nindent 2 }}
  {{- include "twostroke.tlsVolume" (dict "root" $root "role" "worker") | nindent 2 }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ default (printf "%vGi" $block.parallelism.tensor) $root.Values.shmSize }}
  {{- with $block.extraVolumes }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- define "twostroke.workerContainer" -}}
{{- $root := .root -}}
{{- $block := .block -}}
{{- $model := include "twostroke.model" $root | fromJson -}}
{{- $scheme := ternary "HTTPS" "HTTP" $root.Values.tls.enabled -}}
- name: worker
  image: {{ include "twostroke.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: # the image's entry point is tini
    - twostroke
    - worker
    - --role={{ .component }}
    - --worker-id=$(POD_NAME)
    - --host=$(POD_IP) # routers and other workers reach it there
    {{- if not $root.Values.tls.enabled }}
    - --insecure # no certificates: the cluster's key proves who calls, the NetworkPolicy keeps strangers out
    {{- end }}
    - --port={{ $root.Values.ports.worker }}
    - --metrics-port={{ $root.Values.ports.metrics }}
    - --routers-at={{ include "twostroke.routersAt" $root }}
    - --config=/etc/twostroke/config.yaml
    {{- with $model.directory }}
    - --model={{ . }}
    - --served-model-name={{ $model.name }}
    {{- end }}
    {{- if gt (int $block.parallelism.tensor) 1 }}
    - --tensor-parallel-size={{ $block.parallelism.tensor }}
    {{- end }}
    {{- range $block.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  env:
    {{- include "twostroke.env" $root | nindent 4 }}
    {{- if $root.Values.rdma.enabled }}
    {{- range $name, $value := $root.Values.rdma.env }}
    - {name: {{ $name }}, value: {{ $value | quote }}}
    {{- end }}
    {{- end }}
    {{- with $block.extraEnv }}{{ toYaml . | nindent 4 }}{{ end }}
  ports:
    - {name: grpc, containerPort: {{ $root.Values.ports.worker }}}
    - {name: metrics, containerPort: {{ $root.Values.ports.metrics }}}
  # Started: weights loaded, pool allocated, warm. Live: the step loop beats. Ready: it takes orders, a router knows it.
  startupProbe:
    httpGet: {path: /livez, port: metrics, scheme: {{ $scheme }}}
    periodSeconds: {{ $block.probes.periodSeconds }}
    failureThreshold: {{ div (add $block.probes.startupSeconds $block.probes.periodSeconds -1) $block.probes.periodSeconds }}
  livenessProbe:
    httpGet: {path: /livez, port: metrics, scheme: {{ $scheme }}}
    periodSeconds: {{ $block.probes.periodSeconds }}
    timeoutSeconds: 3
    failureThreshold: {{ $block.probes.failureThreshold }}
  readinessProbe:
    httpGet: {path: /readyz, port: metrics, scheme: {{ $scheme }}}
    periodSeconds: {{ $block.probes.periodSeconds }}
    timeoutSeconds: 3
    failureThreshold: 1
  resources:
    {{- include "twostroke.workerResources" . | nindent 4 }}
  securityContext:
    {{- $capabilities := ternary $root.Values.rdma.capabilities list $root.Values.rdma.enabled }}
    {{- include "twostroke.containerSecurity" (dict "root" $root "capabilities" $capabilities) | nindent 4 }}
  volumeMounts:
    {{- include "twostroke.mounts" $root | nindent 4 }}
    - {name: shm, mountPath: /dev/shm}
    {{- with $block.extraVolumeMounts }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{/* Given resources, the GPU, an RDMA device, claims. (On GPUs parallelism.tensor is 1: twostroke.check.) */}}
{{- define "twostroke.workerResources" -}}
{{- $root := .root -}}
{{- $resources := deepCopy .block.resources -}}
{{- $limits := default dict $resources.limits -}}
{{- with include "twostroke.gpuResource" $root }}{{ $_ := set $limits . (int $.block.parallelism.tensor) }}{{ end -}}
{{- if $root.Values.rdma.enabled }}{{ $_ := set $limits $root.Values.rdma.resource 1 }}{{ end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- with $root.Values.dra.claimTemplates -}}
{{- $claims := list -}}
{{- range . }}{{ $claims = append $claims (dict "name" .name) }}{{ end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{ toYaml $resources }}
{{- end }}
